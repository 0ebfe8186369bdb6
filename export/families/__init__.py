"""One file per architecture family: how its config and tensor names map onto the common graph."""
