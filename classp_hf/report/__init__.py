"""What a run leaves to be read (`results.json` and tables, figures, a page, the model card), and its progress bar. It
takes plain data."""

# ruff: noqa: F401
from .card import write_model_card
from .figures import new_figure, plot_old_new, plot_retention, save_figure, series_style, write_figures
from .page import write_page
from .progress import showing_progress
from .results import environment, format_comparison, markdown_table, peak_memory, sequence_tables, write_json
