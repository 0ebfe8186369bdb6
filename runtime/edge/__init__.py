"""The device: the generate loop and the link to the server."""
