"""The transformer: architecture, weights and forward pass. Nothing here knows a loss or an optimizer."""

from jaxlm.models import presets as presets
from jaxlm.models.attention import Cache as Cache
from jaxlm.models.config import ModelConfig as ModelConfig
from jaxlm.models.config import Run as Run
from jaxlm.models.config import computed_in as computed_in
from jaxlm.models.linear import LowRank as LowRank
from jaxlm.models.linear import dense as dense
from jaxlm.models.linear import linear as linear
from jaxlm.models.transformer import Hidden as Hidden
from jaxlm.models.transformer import abstract as abstract
from jaxlm.models.transformer import axes as axes
from jaxlm.models.transformer import cast as cast
from jaxlm.models.transformer import forward as forward
from jaxlm.models.transformer import head as head
from jaxlm.models.transformer import hidden as hidden
from jaxlm.models.transformer import init as init
from jaxlm.models.transformer import init_cache as init_cache
from jaxlm.models.transformer import turned as turned
from jaxlm.models.transformer import unembed as unembed
from jaxlm.models.transformer import unstack as unstack
from jaxlm.models.transformer import value as value
from jaxlm.models.transformer import with_value as with_value
from jaxlm.models.vocabulary import grow as grow
