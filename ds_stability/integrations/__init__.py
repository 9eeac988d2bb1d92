"""Ties to training libraries; importing one changes nothing until its `enable()` is called."""
