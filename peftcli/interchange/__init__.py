"""Reading and writing adapters in the formats of other tools."""
