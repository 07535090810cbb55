"""Registrations: models on their way into the farm, for admins."""

from uuid import UUID

from fastapi import APIRouter

from api.deps import AdminDep, ConnDep, SettingsDep
from farm import registrations
from farm.views import Page, RegistrationView

router = APIRouter(prefix="/registrations", tags=["models"])


@router.get("")
def list_registrations(_: AdminDep, conn: ConnDep) -> Page[RegistrationView]:
    """The newest hundred registrations, ended ones included."""
    return Page(items=registrations.newest(conn))


@router.get("/{registration_id}")
def get_registration(registration_id: UUID, _: AdminDep, conn: ConnDep) -> RegistrationView:
    """How far a registration is. It ends `available`, or `refused` with the reason."""
    return registrations.get(conn, registration_id)


@router.post("/{registration_id}/cancel")
def cancel_registration(registration_id: UUID, _: AdminDep, settings: SettingsDep, conn: ConnDep) -> RegistrationView:
    """End a registration that is under way; it is then `refused`. One that ended stays as it is."""
    return registrations.cancel(conn, registration_id, settings)
