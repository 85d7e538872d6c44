"""What scripts/pictures is made of: record → samples of a real server → top → screen → svg."""
