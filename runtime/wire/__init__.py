"""The wire between device and server: schema, framing, transport security."""
