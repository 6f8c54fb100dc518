"""Environments that Gymnasium lacks; a package, so that no other one of this name comes first."""
