"""A head on a served base: texts embedded over gRPC, trained in torch, fused with the base into one graph."""
