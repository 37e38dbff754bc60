"""Everything on one machine: servers, parts, their checks."""
