"""FRoD: `config`, `basis` (what layers of one kind share), `method` (the mathematics), `model`."""
