"""What a run leaves to be read: `results.json` and tables, figures, and the model card. All of it takes plain data."""

# ruff: noqa: F401
from .card import write_model_card
from .figures import MARKERS, PALETTE, new_figure, plot_accuracy_matrix, plot_importance, plot_retention, save_figure
from .figures import write_figures as write_figures
from .results import LEARNED_BEFORE, Scale, environment, format_comparison, format_sequence, markdown_table, write_json
