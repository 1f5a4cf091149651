"""The server: takes jobs over gRPC, searches, builds, measures in partitions, stores records."""

__version__ = "0.1.0"
