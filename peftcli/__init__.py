"""peftcli: fine-tuning from YAML recipes."""

__version__ = "0.5.0"
