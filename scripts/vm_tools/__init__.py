"""What scripts/vm.py is made of: kernel, image, guest, ways to attach, phases of a run, report."""
