"""The only place that sees wire types: decode, call, encode."""
