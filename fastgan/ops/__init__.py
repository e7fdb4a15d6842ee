"""The numerical building blocks, one file an op: formula, reference, public function."""
