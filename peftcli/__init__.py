"""peftcli: fine-tuning from YAML recipes."""

__version__ = "0.4.0"
