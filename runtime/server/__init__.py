"""The server: sessions, the compute thread and the gRPC front."""
