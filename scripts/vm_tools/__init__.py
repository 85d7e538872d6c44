"""What scripts/vm.py is made of: a kernel, an image, a guest, the ways to attach, the phases of a run, the report."""
