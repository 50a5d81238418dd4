"""One file per verb; each parses, calls one public function and prints its Report."""
