"""Swap on zramd's disks, laid out so that what swap has freed comes back to memory.

A kernel tells a block device of swap that it has freed only where a whole cluster (512 pages) is free, so
most of what programs leave behind when they end stays stored: dead blocks. Two things help, and this does
both:

- Areas: the disk is divided, and the kernel swaps to the parts in a fixed order (descending priorities). It
  then uses freed places of the first areas again before it goes on to the next.
- Refresh: when memory is at ease, an area in which little lives is *emptied*: swapoff brings that back,
  swapon discards all of it. Where much lives, its free places are *wiped*: a program takes them all with
  pages of one repeated word, which a zramd stores in no memory, and gives them back. What is free, only the
  kernel says.

This runs in guests too, where there is no zramd: it needs Python's standard library (3.9 or newer) and
nothing else, and is packed into one file, zramd-guest. On the machine that serves, `zramd refresh` uses it.
"""
