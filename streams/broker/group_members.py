"""Taking a member out of its consumer group, so that nothing waits for its session to run out."""

from __future__ import annotations

from kafka import errors as kafka_errors
from kafka.admin import MemberToRemove

from streams.broker.clients import BrokerConfig, broker_errors, make_admin


def remove_member(broker: BrokerConfig, group: str, instance_id: str) -> bool:
    """Remove a static member; False if the group does not have it. Blocking.

    Only for a member that has ended: a living one would be thrown out. Raises `BrokerUnavailable`.
    """
    admin = make_admin(broker)
    try:
        with broker_errors(broker):
            answer = admin.remove_group_members(
                group, [MemberToRemove(group_instance_id=instance_id, reason="scaled in")]
            )
    finally:
        admin.close()
    (error,) = answer.values()
    if error is kafka_errors.UnknownMemberIdError:
        return False
    if error is not kafka_errors.NoError:
        with broker_errors(broker):
            raise error(f"removing {instance_id} from group {group}")
    return True
