"""What scripts/vm-swap is made of: kernel, image, guest, ways to attach, phases of a run, report."""
