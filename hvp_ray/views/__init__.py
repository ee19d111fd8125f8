"""Views: the plan (every random decision) and the renderers (pixels as a function of image bytes and plan)."""
