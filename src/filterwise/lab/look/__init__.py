"""One look for everything that the lab shows: figures and pages."""
