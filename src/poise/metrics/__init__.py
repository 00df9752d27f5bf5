"""Numbers from predictions: classification, calibration, ranking, Pareto fronts, unlearning."""
