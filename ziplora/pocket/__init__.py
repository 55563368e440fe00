"""A miniature of SDXL, trained on a synthetic world whose truth is known: the demo, and every claim testable on a CPU."""
