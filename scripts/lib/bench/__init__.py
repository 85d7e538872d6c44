"""The parts of scripts/bench: each module of rows measures one group of figures, the others serve them."""
