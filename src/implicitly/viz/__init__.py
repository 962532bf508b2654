"""Pictures and measurements: memory, convergence, gradients, training, calls of f, trajectories.

Measuring needs nothing but PyTorch; drawing needs matplotlib (`pip install "implicitly[viz]"`).
"""

from implicitly.viz.boards import plot_boards, plot_learning
from implicitly.viz.calls import plot_calls, plot_tolerances
from implicitly.viz.convergence import ResidualRecorder, plot_convergence
from implicitly.viz.gradients import plot_gradient_check, relative_difference
from implicitly.viz.memory import peak_bytes, plot_memory, saved_bytes
from implicitly.viz.polytopes import PolytopeStage, plot_polytopes, vertices
from implicitly.viz.training import plot_predictions, plot_training
from implicitly.viz.trajectories import facing, plot_flows, plot_trajectories

__all__ = [
    "PolytopeStage",
    "ResidualRecorder",
    "facing",
    "peak_bytes",
    "plot_boards",
    "plot_calls",
    "plot_convergence",
    "plot_flows",
    "plot_gradient_check",
    "plot_learning",
    "plot_memory",
    "plot_polytopes",
    "plot_predictions",
    "plot_tolerances",
    "plot_training",
    "plot_trajectories",
    "relative_difference",
    "saved_bytes",
    "vertices",
]
