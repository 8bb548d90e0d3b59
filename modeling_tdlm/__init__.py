"""tdlm: tree-structured diffusion language models for Hugging Face transformers (arXiv 2604.03537)."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_mdm_prime import MDMPrimeConfig
from .configuration_tdlm import TDLMConfig
from .generation_tdlm import TDLMGenerateOutput, TDLMGenerationConfig
from .modeling_mdm_prime import MDMPrimeForDiffusionLM, MDMPrimeModel
from .modeling_tdlm import TDLMForDiffusionLM, TDLMModel, TDLMNelboOutput, TDLMOutput
from .pipeline_tdlm import TDLMInfillingPipeline
from .process_tdlm import ConcurrentLaw, DirectLaw, HeightLaw, SequentialLaw
from .streamer_tdlm import TreeTextStreamer
from .vocab_tree_tdlm import VocabTree

__version__ = "0.1.0"

# Both are needed. Registered classes serve whoever has the package; `register_for_auto_class` makes save_pretrained
# copy the code files beside the weights and name them in `auto_map`, for whoever has not.
AutoConfig.register("tdlm", TDLMConfig, exist_ok=True)
AutoModel.register(TDLMConfig, TDLMModel, exist_ok=True)
AutoModelForCausalLM.register(TDLMConfig, TDLMForDiffusionLM, exist_ok=True)
TDLMConfig.register_for_auto_class()
TDLMModel.register_for_auto_class("AutoModel")
TDLMForDiffusionLM.register_for_auto_class("AutoModelForCausalLM")

AutoConfig.register("mdm_prime", MDMPrimeConfig, exist_ok=True)
AutoModel.register(MDMPrimeConfig, MDMPrimeModel, exist_ok=True)
AutoModelForCausalLM.register(MDMPrimeConfig, MDMPrimeForDiffusionLM, exist_ok=True)
MDMPrimeConfig.register_for_auto_class()
MDMPrimeModel.register_for_auto_class("AutoModel")
MDMPrimeForDiffusionLM.register_for_auto_class("AutoModelForCausalLM")

PIPELINE_REGISTRY.register_pipeline("infilling", TDLMInfillingPipeline, pt_model=AutoModelForCausalLM)

__all__ = [
    "ConcurrentLaw",
    "DirectLaw",
    "HeightLaw",
    "MDMPrimeConfig",
    "MDMPrimeForDiffusionLM",
    "MDMPrimeModel",
    "SequentialLaw",
    "TDLMConfig",
    "TDLMForDiffusionLM",
    "TDLMGenerateOutput",
    "TDLMGenerationConfig",
    "TDLMInfillingPipeline",
    "TDLMModel",
    "TDLMNelboOutput",
    "TDLMOutput",
    "TreeTextStreamer",
    "VocabTree",
]
