"""Pictures and measurements: memory, convergence, gradients, training."""

from implicitly.viz.memory import peak_bytes, plot_memory, saved_bytes

__all__ = ["peak_bytes", "plot_memory", "saved_bytes"]
