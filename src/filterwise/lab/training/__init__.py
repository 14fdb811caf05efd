"""The training engine: one loop for every run, on Lightning Fabric.

::

    train           a run from settings to a record, resumed where it was killed
    loop            epochs and steps; what a run has come to so far
    stepper         one optimizer step out of micro-batches
    checkpoint      a run's folder: checkpoint, record, lock
    logs            curves as CSV and TensorBoard; MLflow, Weights & Biases
    optimizers      optimizer and parameter groups
    schedules       learning rate and momentum by step
    settings        every knob of a run
    place           device, precision and processes

What is learned (data, model, loss, metrics) is a task: `filterwise.lab.tasks`.
"""
