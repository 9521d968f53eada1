"""The private methods and attributes of `transformers.Trainer` that `hf.py` builds on, each as it is expected to be."""

import importlib.metadata
import inspect
from collections.abc import Callable

# The private methods of transformers.Trainer that hf.py overrides or calls, and their parameters.
METHODS = {
    "_evaluate": "(self, trial, ignore_keys_for_eval, skip_scheduler=False)",
    "_finalize_training": "(self, trial, num_train_samples, start_time)",
    "_get_dataloader": "(self, dataset, description, batch_size, sampler_fn=None, is_training=False, "
    "dataloader_key=None)",
    "_get_eval_sampler": "(self, eval_dataset)",
    "_get_output_dir": "(self, trial)",
    "_get_train_sampler": "(self, train_dataset=None)",
    "_init_training_state": "(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, "
    "trial)",
    "_load_best_model": "(self)",
    "_load_callback_state": "(self)",
    "_load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
    "_load_optimizer_and_scheduler": "(self, checkpoint)",
    "_load_rng_state": "(self, checkpoint)",
    "_load_scaler": "(self, checkpoint)",
    "_push_from_checkpoint": "(self, checkpoint_folder)",
    "_run_epoch": "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)",
    "_save": "(self, output_dir=None, state_dict=None)",
    "_save_checkpoint": "(self, model, trial)",
    "_save_optimizer_and_scheduler": "(self, output_dir)",
    "_save_rng_state": "(self, output_dir)",
    "_save_scaler": "(self, output_dir)",
    "_set_signature_columns_if_needed": "(self)",
    "_track_num_input_tokens": "(self, inputs)",
    "save_model": "(self, output_dir=None, _internal_call=False)",
}
# Its private attributes that hf.py reads or sets, and the method that sets each first.
ATTRIBUTES = {
    "_globalstep_last_logged": "_inner_training_loop",
    "_signature_columns": "__init__",
    "_total_loss_scalar": "_inner_training_loop",
    "_tr_loss": "_inner_training_loop",
}


def verify(trainer: type) -> None:
    """Raises ImportError if a private method or attribute of transformers.Trainer is not as hf.py expects it."""
    wrong = []
    for name, expected in METHODS.items():
        method = getattr(trainer, name, None)
        if method is None or _parameters(method) != expected:
            found = "does not exist" if method is None else f"takes {_parameters(method)}"
            wrong.append(f"Trainer.{name} {found}, but {expected} was expected")
    for name, setter in ATTRIBUTES.items():
        method = inspect.unwrap(getattr(trainer, setter, None))  # other libraries wrap methods of Trainer
        if method is None or name not in method.__code__.co_names:
            wrong.append(f"Trainer.{setter} does not set {name}")
    if wrong:
        version = importlib.metadata.version("transformers")
        raise ImportError(
            f"rlkernels.trainers supports transformers 5.17 to 5.23; got {version}, in which {'; '.join(wrong)}: "
            "pip install 'transformers>=5.17,<5.24'",
            name="transformers",
        )


def _parameters(method: Callable) -> str:
    parameters = inspect.signature(method).parameters.values()
    return str(inspect.Signature([each.replace(annotation=inspect.Parameter.empty) for each in parameters]))
