"""One call of a layer, event by event, on machines that are not here. Read ``world.py`` first; docs/simulation.md."""
