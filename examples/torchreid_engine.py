"""torchreid's engine with a loss from here: `engine.criterion = ...` is all that changes.

The losses of the softmax family, over all negatives or the k hardest, train at the learning rate of cross-entropy;
HS-LR starts slower. torchreid comes as a source, github.com/KaiyangZhou/deep-person-reid; `torchreid` on PyPI, with
which this is run, is somebody's copy of it. The "persons" are places in two photographs, those of the test
never trained on.
"""

import torch
import torchreid
from torchvision.utils import save_image

import fused_losses as fl
from photographs import Photographs

IDENTITIES, UNSEEN, LOOKS = 200, 50, 8


class Places(torchreid.data.ImageDataset):
    """Rows (file, identity, camera, data set), as torchreid wants them: every look is from a camera of its own."""

    def __init__(self, root: str = "", **options):
        photographs, generator = Photographs(IDENTITIES + UNSEEN), torch.Generator().manual_seed(0)
        places, splits = torch.randperm(IDENTITIES + UNSEEN, generator=generator), ([], [], [])
        for camera in range(LOOKS):
            for identity, image in enumerate(photographs.look(places, generator)):
                file = f"place{identity}_{camera}.png"
                save_image(image, file)
                seen = identity < IDENTITIES
                train, query, gallery = splits
                split = train if seen else query if camera == 0 else gallery
                split.append((file, identity if seen else identity - IDENTITIES, camera, 0))
        super().__init__(*splits, **options)


# torchreid's smoothed cross-entropy and ours are the same.
logits, target = torch.randn(16, 751), torch.randint(751, (16,))
theirs = torchreid.losses.CrossEntropyLoss(751, use_gpu=False)
torch.testing.assert_close(fl.CrossEntropyLoss(label_smoothing=0.1)(logits, target), theirs(logits, target))
print("torchreid's smoothed cross-entropy: the same number")

torch.manual_seed(0)
torchreid.data.register_image_dataset("places", Places)
data = torchreid.data.ImageDataManager(
    sources="places", height=64, width=64, batch_size_train=64, transforms=[], workers=0, use_gpu=False
)
model = torchreid.models.build_model("osnet_x0_25", data.num_train_pids, pretrained=False)
optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
scheduler = torchreid.optim.build_lr_scheduler(optimizer, "single_step", stepsize=4)
engine = torchreid.engine.ImageSoftmaxEngine(data, model, optimizer, scheduler, use_gpu=False)
engine.criterion = fl.CRLLoss(k=50, label_smoothing=0.1)
engine.run(max_epoch=5)
assert engine.test(ranks=[1]) > 0.3  # rank-1; by chance it is 0.02
