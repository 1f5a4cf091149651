"""Tuning one model on several server instances: performs what the lease state machine decides, over gRPC."""
