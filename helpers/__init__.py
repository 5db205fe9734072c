"""The plan of the house: what the notebooks import, in the order in which the data passes through it.

    settings     every choice of a run, with its type and bounds
    run          a run's folder and its files, the machine, devices and clocks
    plots        figures from plain data, and what else a notebook shows
    tracking     one door to Weights & Biases                                            03, 05
    text         text to words to ids, and back                                          01
    corpus       the files of a corpus to exchanges, query and response                  01
    batches      exchanges to splits, vocabulary and padded batches                      01
    model        encoder, attention (which masks padding) and decoder                    02
    evaluation   the loss, and the likelihood of given responses                         03, 04
    training     one update, the loop around it, checkpoints, resuming                   03
    decoding     logits to words: greedy, beam, sampling, mutual information             04
    chat         text in, reply out; in a terminal and in a notebook                     04
    sweep        a search space, its trials and their workers                            05
    importance   what moved the loss, by several measures                                05
    profiling    where time and memory go                                                06
    deploy       TorchScript, quantisation, what comes after; a page without Python      07
    latency      parity first, then milliseconds                                         07
    __main__     the commands: python -m helpers --help

A room imports only rooms above its own.
"""

import os

# PyTorch's threads sleep while they wait for one another; turning, as is usual, they are slow beside other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
