"""Ways into other libraries; each module imports its library, so none is imported from here."""
