"""Makes LeRobot's own commands find the policy `hlrp_smolvla_shared` and the environment `metaworld_plain`.

LeRobot imports every installed distribution whose name starts with `lerobot_policy_`, under the same module name.
"""

import smolvla_shared.environments
import smolvla_shared.lerobot_policy  # noqa: F401  (importing them registers policy and environment)
