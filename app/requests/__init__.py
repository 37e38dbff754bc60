"""What a caller asks and is answered, as the wire has it. Pure."""
