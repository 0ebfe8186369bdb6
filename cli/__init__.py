"""The command line: one thin file per command over a public function."""
