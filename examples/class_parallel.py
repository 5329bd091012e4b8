"""Face recognition with 4,000,000 identities: the classes of the head over all processes, the images, too.

    torchrun --nproc-per-node 4 -m examples.class_parallel

Each process embeds its own images; the loss gathers the embeddings and gives each back the gradient of its own. With
GPUs the same command runs over NCCL, one process for each.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from cudfast import FusedLinearCUDLoss

FEATURES, PIXELS, SCALE = 16, 64, 64.0


def faces(identities: Tensor) -> Tensor:
    """(n, FEATURES) the face of every identity: a point of the sphere that looks random and needs no memory."""
    angles = (identities.double() + 1).unsqueeze(-1) * torch.linspace(
        1.7, 9.1, FEATURES, dtype=torch.float64, device=identities.device
    )
    return F.normalize(torch.sin(angles * 1.1e3), dim=-1).float()


def photographs(identities: Tensor, generator: torch.Generator) -> Tensor:
    """(n, PIXELS) a noisy image of every identity."""
    lens = torch.randn(FEATURES, PIXELS, generator=torch.Generator().manual_seed(1)).to(identities.device)
    noise = torch.randn(len(identities), PIXELS, generator=generator, device=identities.device)
    return faces(identities) @ lens + 0.05 * noise


def train(classes: int, steps: int, rows: int, device: torch.device) -> list[tuple[float, float]]:
    """Loss and accuracy of every step, of `rows` images a process, the same on all of them."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the trunk starts alike everywhere
    trunk = nn.Linear(PIXELS, FEATURES).to(device)
    first, last = classes * rank // ranks, classes * (rank + 1) // ranks
    teacher_head = faces(torch.arange(first, last, device=device))
    head = nn.Parameter(teacher_head.clone())
    loss = FusedLinearCUDLoss(
        memory_budget=128 << 20,
        student_logit_scale=SCALE,
        teacher_logit_scale=SCALE,
        process_group=dist.group.WORLD,
        sequence_sharded=True,
    )
    adam = torch.optim.Adam(trunk.parameters(), lr=3e-2)
    sgd = torch.optim.SGD([head], lr=1e-3, foreach=False)
    generator = torch.Generator(device).manual_seed(rank)
    found = []
    for step in range(steps):
        begin = time.perf_counter()
        mine = torch.randint(classes, (rows,), generator=generator, device=device)
        labels = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(labels, mine)
        embeddings = F.normalize(trunk(photographs(mine, generator)), dim=-1)
        value, stats = loss(
            embeddings,
            head,
            torch.cat(labels),
            teacher_hidden=faces(mine),
            teacher_weight=teacher_head,
            return_stats=True,
        )
        adam.zero_grad()
        sgd.zero_grad()
        value.backward()
        for parameter in trunk.parameters():  # each process has the gradient of its own images: a sum, not an average
            dist.all_reduce(parameter.grad)
        adam.step()
        sgd.step()
        found.append((value.item(), stats.student_correct.float().mean().item()))
        if rank == 0:
            seconds = time.perf_counter() - begin
            print(f"step {step}: loss {found[-1][0]:.3f}, accuracy {found[-1][1]:.2f}, {seconds:.1f} s")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=4_000_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=16, help="images of a process in a step")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    train(arguments.classes, arguments.steps, arguments.rows, device)
    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, device=device)
    dist.all_reduce(peak)
    if dist.get_rank() == 0:
        print(f"resident memory of all processes, at most: {peak.item():.1f} GiB")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
