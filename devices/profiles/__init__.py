"""Profiles of devices, one a file; `isthmus.devices.profile` reads them."""
