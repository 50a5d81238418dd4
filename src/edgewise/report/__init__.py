"""A Report drawn as terminal table, Markdown, HTML, SVG plot or JSON."""
