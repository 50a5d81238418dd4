"""The main job: number formats, KV format and context under a Budget, with a Pareto report."""
