"""Channels with balancing, retries and health; typed calls, numpy in and numpy out."""
