"""An export from Python: cut a model at layer SPLIT and look at the validation report.

python examples/export.py smollm2-135m-instruct OUT 10 [TEXT]

The codec klt is calibrated on the file TEXT, or on what the model writes itself.
"""

import sys

from isthmus import export_bundle

model, out, split, *text = sys.argv[1:]
calibration = text[0] if text else None
manifest = export_bundle(model, out, split=int(split), front_bits=4, back_bits=8, calibration=calibration)
report = manifest.validation
print(f"{manifest.source.name}: {manifest.split} of {manifest.architecture.layers} layers on the device")
print(f"top-1 agreement {report['top1_agreement']:.3f}, KL {report['kl']:.4f} on {report['tokens']} tokens")
