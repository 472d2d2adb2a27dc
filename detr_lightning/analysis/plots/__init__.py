"""Pictures of an extraction: each function returns a matplotlib `Figure`, for a notebook or `savefig`.

A category has the same color in every picture. No display is needed.
"""

from detr_lightning.analysis.plots.contact_sheets import neighbours, search_results
from detr_lightning.analysis.plots.of_embeddings import embedding_map, layer_similarity
from detr_lightning.analysis.plots.on_images import attention, detections

__all__ = ["attention", "detections", "embedding_map", "layer_similarity", "neighbours", "search_results"]
