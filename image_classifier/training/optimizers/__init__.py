"""How weights are stepped: which parameters are treated how (groups), Muon, and the learning rate's course (schedules)."""
