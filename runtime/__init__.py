"""What runs: bundle reader, segment executor, KV cache, the device's loop, the server, the wire."""
