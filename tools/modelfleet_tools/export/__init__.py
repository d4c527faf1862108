"""From a checkpoint to a bundle: export, checks against the source, smaller precisions. torch is imported when used."""
