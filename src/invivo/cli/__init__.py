"""The command line: ``invivo serve | chat | generate | score | models | keys | bench``."""
